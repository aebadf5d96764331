{{/* Container of the Ray head; `args` are added by static mode, by the operator in kuberay mode. */}}
{{- define "pando.rayHeadContainer" -}}
name: ray-head
image: {{ include "pando.image" (dict "root" . "image" .Values.worker.image) }}
imagePullPolicy: {{ .Values.worker.image.pullPolicy }}
env:
  {{- include "pando.rayEnv" . | nindent 2 }}
ports:
  - {name: gcs, containerPort: 6379}
  - {name: agent, containerPort: 52365}
  {{- if eq .Values.ray.head.dashboard "on" }}
  - {name: dashboard, containerPort: 8265}
  {{- end }}
securityContext:
  {{- include "pando.containerSecurity" . | nindent 2 }}
resources:
  {{- toYaml .Values.ray.head.resources | nindent 2 }}
{{ include "pando.rayProbes" . }}
volumeMounts:
  {{- include "pando.rayMounts" . | nindent 2 }}
{{- end -}}

{{/* Pod spec of the head without its container. */}}
{{- define "pando.rayHeadPod" -}}
{{ include "pando.podCommon" . }}
securityContext:
  {{- include "pando.podSecurity" (dict "user" 10001 "group" 10001) | nindent 2 }}
{{- with .Values.ray.head.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.ray.head.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  {{- include "pando.rayVolumes" (dict "root" . "shm" "128Mi") | nindent 2 }}
{{- end -}}

{{/* Container of a Ray worker node. */}}
{{- define "pando.rayWorkerContainer" -}}
{{- $resources := deepCopy .Values.worker.resources -}}
{{- if .Values.worker.gpus -}}
{{- $gpus := dict .Values.worker.gpuResource .Values.worker.gpus -}}
{{- $resources = mergeOverwrite $resources (dict "limits" $gpus "requests" $gpus) -}}
{{- end -}}
name: ray-worker
image: {{ include "pando.image" (dict "root" . "image" .Values.worker.image) }}
imagePullPolicy: {{ .Values.worker.image.pullPolicy }}
env:
  {{- include "pando.rayEnv" . | nindent 2 }}
  {{- with .Values.worker.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
ports:
  - {name: agent, containerPort: 52365}
securityContext:
  {{- include "pando.containerSecurity" . | nindent 2 }}
resources:
  {{- toYaml $resources | nindent 2 }}
{{ include "pando.rayProbes" . }}
volumeMounts:
  {{- include "pando.rayMounts" . | nindent 2 }}
  {{- with .Values.worker.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Pod spec of a worker node without its container. */}}
{{- define "pando.rayWorkerPod" -}}
{{ include "pando.podCommon" . }}
terminationGracePeriodSeconds: {{ .Values.worker.terminationGracePeriodSeconds }}
securityContext:
  {{- include "pando.podSecurity" (dict "user" 10001 "group" 10001) | nindent 2 }}
{{- with .Values.worker.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.worker.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.worker.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.worker.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .Values.worker.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
volumes:
  {{- include "pando.rayVolumes" (dict "root" . "shm" .Values.worker.shmSize) | nindent 2 }}
  {{- with .Values.worker.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}
