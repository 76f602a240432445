{{- define "kvcrush.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "kvcrush.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "kvcrush.labels" -}}
{{ include "kvcrush.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "kvcrush.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* A budget as --kv-budget takes it: 1.0 is the whole cache, and 1 would be one token. */}}
{{- define "kvcrush.budget" -}}
{{- if le (float64 .) 1.0 }}{{ ternary "1.0" (toString .) (eq (float64 .) 1.0) }}{{ else }}{{ int64 . }}{{ end -}}
{{- end -}}

{{/* The ConfigMap that has rules.yaml; nothing without rules. */}}
{{- define "kvcrush.rules" -}}
{{- if .Values.rules.text }}{{ include "kvcrush.name" . }}-rules{{ else }}{{ .Values.rules.configMap }}{{ end -}}
{{- end -}}

{{/* What `vllm serve --config` reads. */}}
{{- define "kvcrush.serve" -}}
{{- $own := dict "model" .Values.model.path "served-model-name" .Values.model.name "host" "0.0.0.0" "port" 8000 "shutdown-timeout" .Values.drainSeconds -}}
{{- with .Values.policy -}}
{{- if .name -}}
{{- $_ := set $own "kv-policy" .name -}}
{{- $_ := set $own "kv-budget" (include "kvcrush.budget" .budget) -}}
{{- if not (kindIs "invalid" .budgetMax) }}{{ $_ := set $own "kv-budget-max" (include "kvcrush.budget" .budgetMax) }}{{ end -}}
{{- if .allow }}{{ $_ := set $own "kv-policy-allow" (join "," .allow) }}{{ end -}}
{{- if not (kindIs "invalid" .minTokens) }}{{ $_ := set $own "kv-min-tokens" .minTokens }}{{ end -}}
{{- $config := deepCopy .config -}}
{{- if $.Values.tables.file }}{{ $_ := set $config "tables" (printf "/tables/%s" $.Values.tables.file) }}{{ end -}}
{{- if $config }}{{ $_ := set $own "kv-policy-config" $config }}{{ end -}}
{{- if include "kvcrush.rules" $ }}{{ $_ := set $own "kv-budget-rules" "/rules/rules.yaml" }}{{ end -}}
{{- end -}}
{{- end -}}
{{- /* Whole numbers of values arrive as floats, which would become 5.36870912e+08. */ -}}
{{- range $key, $value := merge (deepCopy .Values.serve) $own }}
{{ $key }}: {{ if and (kindIs "float64" $value) (eq (floor $value) $value) }}{{ int64 $value }}{{ else if kindIs "map" $value }}{{ toJson $value }}{{ else }}{{ $value | toJson }}{{ end }}
{{- end }}
{{- end -}}
