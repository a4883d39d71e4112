{{/* Name of all resources: at most 40 characters, to leave room for suffixes. */}}
{{- define "stagecoach.name" -}}
{{- $own := ternary .Release.Name (printf "%s-stagecoach" .Release.Name) (contains "stagecoach" .Release.Name) -}}
{{- .Values.fullnameOverride | default $own | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Selector labels of the operator's pods. They must never change: a Deployment's selector is immutable. */}}
{{- define "stagecoach.selector" -}}
app.kubernetes.io/name: stagecoach
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "stagecoach.labels" -}}
{{ include "stagecoach.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* JSON list of the namespaces whose runs are reconciled. Empty: all. */}}
{{- define "stagecoach.namespaces" -}}
{{- if eq .Values.scope "namespaces" -}}
{{- if not .Values.namespaces }}{{ fail "namespaces: empty; list the namespaces of runs, or set another `scope`" }}{{ end -}}
{{- toJson .Values.namespaces -}}
{{- else -}}
{{- if .Values.namespaces }}{{ fail "namespaces: only for `scope: namespaces`; set that, or leave the list out" }}{{ end -}}
{{- ternary (list .Release.Namespace) list (eq .Values.scope "namespace") | toJson -}}
{{- end -}}
{{- end -}}

{{/* Image reference. Arguments: root, name, repository, digest. */}}
{{- define "stagecoach.image" -}}
{{- $images := .root.Values.images -}}
{{- $repository := .repository | default (printf "%s/%s" $images.registry .name) -}}
{{- if .digest -}}
{{ printf "%s@%s" $repository .digest }}
{{- else -}}
{{ printf "%s:%s" $repository ($images.tag | default .root.Chart.AppVersion) }}
{{- end -}}
{{- end -}}

{{- define "stagecoach.operatorImage" -}}
{{ include "stagecoach.image" (dict "root" . "name" "operator" "repository" .Values.images.operatorRepository "digest" .Values.images.operatorDigest) }}
{{- end -}}

{{- define "stagecoach.trainerImage" -}}
{{ .Values.stages.image | default (include "stagecoach.image" (dict "root" . "name" "trainer" "repository" .Values.images.trainerRepository "digest" .Values.images.trainerDigest)) }}
{{- end -}}

{{- define "stagecoach.certificateSecret" -}}
{{ .Values.progress.certificateSecret | default (printf "%s-progress" (include "stagecoach.name" .)) }}
{{- end -}}

{{/* Annotations of the hook that makes the certificate. Argument: its weight. */}}
{{- define "stagecoach.certificateHook" -}}
helm.sh/hook: pre-install,pre-upgrade
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end -}}

{{/* Security contexts of a pod and of a container for the restricted Pod Security Standard. */}}
{{- define "stagecoach.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "stagecoach.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Permissions of the operator in the namespaces of runs. */}}
{{- define "stagecoach.rules" -}}
- apiGroups: [stagecoach.dev]
  resources: [trainingruns]
  verbs: [get, list, watch, patch]
- apiGroups: [stagecoach.dev]
  resources: [trainingruns/status]
  verbs: [patch]
# Required for owner references with blockOwnerDeletion by the OwnerReferencesPermissionEnforcement admission plugin.
- apiGroups: [stagecoach.dev]
  resources: [trainingruns/finalizers]
  verbs: [update]
- apiGroups: [jobset.x-k8s.io]
  resources: [jobsets]
  # Patch: labels or an owner reference that others have taken off a JobSet are restored.
  verbs: [get, list, watch, create, patch, delete]
# Names of the operator's ConfigMaps contain a digest of their content, so that it never changes or deletes one.
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, create]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [create]
- apiGroups: [""]
  resources: [pods]
  # Delete: pods on lost nodes, and those whose JobSet others have deleted.
  verbs: [list, watch, delete]
- apiGroups: [kueue.x-k8s.io]
  resources: [workloads]
  verbs: [list, watch]
- apiGroups: [""]
  resources: [events]
  verbs: [list, create]
{{- end -}}
