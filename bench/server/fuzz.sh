#!/usr/bin/env bash
# Judge: schemathesis makes requests from the server's own OpenAPI document, good and bad, and looks for status 5xx,
# undocumented statuses and answers that do not fit their schema. Usage: bench/server/fuzz.sh [URL] [EXAMPLES]
set -euo pipefail
url=${1:-http://127.0.0.1:8080}
examples=${2:-40}
exec "${SCHEMATHESIS:-schemathesis}" run "$url/openapi.json" --url "$url" \
    --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance \
    --max-examples "$examples" --request-timeout 60 --seed 1 --generation-database none --phases examples,coverage,fuzzing
