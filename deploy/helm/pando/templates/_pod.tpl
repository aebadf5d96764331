{{/* What every pod has in common. Service links stay off: they would set PANDO_* variables that no setting knows. */}}
{{- define "pando.podCommon" -}}
automountServiceAccountToken: false
enableServiceLinks: false
serviceAccountName: {{ include "pando.serviceAccount" . }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Restricted pod security: dict "user" UID "group" GID */}}
{{- define "pando.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .user }}
runAsGroup: {{ .group }}
fsGroup: {{ .group }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "pando.containerSecurity" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* Redis URL of one part: dict "root" $ "part" router or worker. The password is of the auth Secret, kubelet fills in
     $(REDIS_PASSWORD); each worker's own name takes the place of {worker_id}. */}}
{{- define "pando.redisEnv" -}}
{{- $redis := .root.Values.redis -}}
{{- $secret := include "pando.authSecret" .root -}}
{{- if and (eq $redis.mode "external") $redis.external.urls -}}
- name: PANDO_REDIS
  valueFrom:
    secretKeyRef: {name: {{ $secret }}, key: redis-{{ .part }}-url}
{{- else -}}
{{- $user := ternary (ternary "router" "{worker_id}" (eq .part "router")) "" $redis.users -}}
{{- $at := ternary "6379/0" (printf "%v/%v" $redis.external.port $redis.external.database) (eq $redis.mode "internal") -}}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef: {name: {{ $secret }}, key: {{ ternary (printf "redis-%s-password" .part) "redis-password" $redis.users }}}
- name: PANDO_REDIS
  value: {{ printf "%s://%s:$(REDIS_PASSWORD)@%s:%s" (ternary "rediss" "redis" $redis.tls.enabled) $user (include "pando.redisHost" .root) $at | quote }}
{{- end }}
{{- if include "pando.redisCa" .root }}
- {name: PANDO_REDIS_CA, value: /etc/pando-redis-tls/ca.crt}
{{- end }}
{{- end -}}

{{/* The CA of Redis: a mount, and its volume. */}}
{{- define "pando.redisCaMount" -}}
{{- if include "pando.redisCa" . }}
- {name: redis-ca, mountPath: /etc/pando-redis-tls, readOnly: true}
{{- end }}
{{- end -}}

{{- define "pando.redisCaVolume" -}}
{{- if include "pando.redisCa" . }}
- name: redis-ca
  secret:
    secretName: {{ include "pando.redisTlsSecret" . }}
    items: [{key: ca.crt, path: ca.crt}]
{{- end }}
{{- end -}}

{{/* What routers send and workers ask for on the link between them. */}}
{{- define "pando.linkEnv" -}}
- name: PANDO_LINK_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ include "pando.authSecret" . }}, key: link-token}
{{- end -}}

{{/* Ray: token authentication named outright, since Ray turns it on or off by what it finds. */}}
{{- define "pando.rayEnv" -}}
- {name: RAY_AUTH_MODE, value: token}
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ include "pando.authSecret" . }}, key: ray-token}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_health_check_initial_delay_ms, value: "2000"}
- {name: RAY_health_check_period_ms, value: "2000"}
- {name: RAY_health_check_timeout_ms, value: "2000"}
- {name: RAY_health_check_failure_threshold, value: "3"}
{{- end -}}

{{/* Probes of a Ray node: its agent answers for the node, without the token. */}}
{{- define "pando.rayProbes" -}}
startupProbe:
  httpGet: {path: /api/local_raylet_healthz, port: agent}
  periodSeconds: 5
  failureThreshold: 36
readinessProbe:
  httpGet: {path: /api/local_raylet_healthz, port: agent}
  periodSeconds: 5
  timeoutSeconds: 4
  failureThreshold: 3
livenessProbe:
  httpGet: {path: /api/local_raylet_healthz, port: agent}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end -}}

{{/* Volumes of a Ray node: dict "root" $ "shm" SIZE */}}
{{- define "pando.rayVolumes" -}}
- name: tmp
  emptyDir: {sizeLimit: 4Gi}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .shm }}}
{{ include "pando.modelVolume" .root }}
{{- include "pando.redisCaVolume" .root }}
{{- end -}}

{{- define "pando.modelVolume" -}}
- name: models
  {{- if .Values.modelCache.enabled }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-models" (include "pando.fullname" .)) .Values.modelCache.existingClaim }}
  {{- else }}
  emptyDir: {sizeLimit: {{ .Values.modelCache.size }}}
  {{- end }}
{{- end -}}

{{- define "pando.rayMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
- {name: models, mountPath: /models}
{{- include "pando.redisCaMount" . }}
{{- end -}}
