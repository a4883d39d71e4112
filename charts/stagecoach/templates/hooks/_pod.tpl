{{/* A pod that runs one command with the operator's image. Arguments: root, command, account (the operator's if unset),
namespaces (whether the command takes those of the runs; true if unset). */}}
{{- define "stagecoach.hookPod" -}}
restartPolicy: Never
serviceAccountName: {{ .account | default (include "stagecoach.name" .root) }}
automountServiceAccountToken: true
enableServiceLinks: false
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets: {{- range . }}
- name: {{ . }}
{{- end }}
{{- end }}
{{- with .root.Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.tolerations }}
tolerations: {{- toYaml . | nindent 0 }}
{{- end }}
securityContext: {{- include "stagecoach.podSecurity" .root | nindent 2 }}
containers:
- name: hook
  image: {{ include "stagecoach.operatorImage" .root }}
  imagePullPolicy: {{ .root.Values.images.pullPolicy }}
  command: [/opt/stagecoach/bin/python, -m, stagecoach_operator.chart_hooks]
  args:
  {{- range .command }}
  - {{ . }}
  {{- end }}
  {{- if ne (toString .namespaces) "false" }}
  {{- range include "stagecoach.namespaces" .root | fromJsonArray }}
  - --runs-namespace={{ . }}
  {{- end }}
  {{- end }}
  securityContext: {{- include "stagecoach.containerSecurity" .root | nindent 4 }}
  env:
  - name: POD_NAMESPACE
    valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
  resources: {{- toYaml .root.Values.resources | nindent 4 }}
{{- end -}}
