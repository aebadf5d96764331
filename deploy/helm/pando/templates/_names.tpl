{{/* Prefix of every object's name; short, because KubeRay adds to it. */}}
{{- define "pando.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Labels that select pods and never change: dict "root" $ "component" NAME */}}
{{- define "pando.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | trunc 63 }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{/* All labels of an object: dict "root" $ "component" NAME */}}
{{- define "pando.labels" -}}
{{ include "pando.selector" . }}
app.kubernetes.io/part-of: pando
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of a pod: none that an upgrade of the chart alone would change. */}}
{{- define "pando.podLabels" -}}
{{ include "pando.selector" . }}
app.kubernetes.io/part-of: pando
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "pando.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "pando.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "pando.cluster" -}}
{{- default (include "pando.fullname" .) .Values.cluster -}}
{{- end -}}

{{- define "pando.authSecret" -}}
{{- default (printf "%s-auth" (include "pando.fullname" .)) .Values.auth.existingSecret -}}
{{- end -}}

{{- define "pando.tenantsSecret" -}}
{{- default (printf "%s-tenants" (include "pando.fullname" .)) .Values.tenants.existingSecret -}}
{{- end -}}

{{/* An image reference: dict "root" $ "image" VALUES */}}
{{- define "pando.image" -}}
{{- if .image.digest -}}
{{- printf "%s@%s" .image.repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" .image.repository (default .root.Chart.AppVersion .image.tag) -}}
{{- end -}}
{{- end -}}

{{/* Whether clients need a CA's file to trust Redis: "yes" or nothing. */}}
{{- define "pando.redisCa" -}}
{{- if and .Values.redis.tls.enabled (or (eq .Values.redis.mode "internal") .Values.redis.tls.existingSecret) -}}yes{{- end -}}
{{- end -}}

{{- define "pando.redisTlsSecret" -}}
{{- default (printf "%s-redis-tls" (include "pando.fullname" .)) .Values.redis.tls.existingSecret -}}
{{- end -}}

{{- define "pando.redisHost" -}}
{{- if eq .Values.redis.mode "internal" -}}
{{- printf "%s-redis" (include "pando.fullname" .) -}}
{{- else -}}
{{- .Values.redis.external.host -}}
{{- end -}}
{{- end -}}

{{/* HOST:PORT of the Ray head. KubeRay names the head's Service after the RayCluster. */}}
{{- define "pando.rayAddress" -}}
{{- if eq .Values.ray.mode "static" -}}
{{- printf "%s-ray-head:6379" (include "pando.fullname" .) -}}
{{- else if eq .Values.ray.mode "kuberay" -}}
{{- printf "%s-head-svc:6379" (include "pando.fullname" .) -}}
{{- else -}}
{{- .Values.ray.external.address -}}
{{- end -}}
{{- end -}}

{{/* Number of worker actors. */}}
{{- define "pando.workerCount" -}}
{{- if eq .Values.ray.mode "external" -}}
{{- .Values.ray.external.workers -}}
{{- else -}}
{{- mul .Values.worker.replicas (max 1 .Values.worker.gpus) -}}
{{- end -}}
{{- end -}}

{{/* Ray's count of CPUs on a worker node: one for each worker actor. */}}
{{- define "pando.nodeCpus" -}}
{{- max 1 .Values.worker.gpus -}}
{{- end -}}

{{/* Egress rule to Redis. */}}
{{- define "pando.redisEgress" -}}
{{- if eq .Values.redis.mode "internal" -}}
- ports: [{port: 6379}]
  to:
    - podSelector:
        matchLabels:
          {{- include "pando.selector" (dict "root" . "component" "redis") | nindent 10 }}
{{- else -}}
- ports: [{port: {{ .Values.redis.external.port }}}]
{{- end -}}
{{- end -}}
