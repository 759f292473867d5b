#!/usr/bin/env bash
# The API by hand. Start the server first: cargo run -- serve --no-auth
set -euo pipefail
URL=${MOTE_URL:-http://127.0.0.1:8080}
AUTH=(-H "authorization: Bearer ${MOTE_API_KEY:-no-key-needed}")
JSON=(-H 'content-type: application/json')

echo '# the base model'
BASE=$(curl -sS --fail "${AUTH[@]}" "$URL/v1/models" | python3 -c 'import json,sys; print(json.load(sys.stdin)["data"][0]["id"])')
echo "$BASE"

echo '# what an adapter of this base is'
curl -sS --fail "${AUTH[@]}" "$URL/adapters/schemes"; echo

echo '# an adapter: 13 bf16 numbers, 26 bytes (0.25 is 0x3e80)'
printf '\x80\x3e%.0s' {1..13} |
  curl -sS --fail "${AUTH[@]}" -H 'content-type: application/octet-stream' --data-binary @- \
    "$URL/adapters?name=alice&scheme=tiny13&dtype=bf16&on_conflict=new_generation"; echo

echo '# a completion under it'
curl -sS --fail "${AUTH[@]}" "${JSON[@]}" "$URL/v1/completions" \
  -d '{"model": "alice", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}'; echo

echo '# the same adapter inside the request: nothing is stored'
INLINE=$(printf '\x80\x3e%.0s' {1..13} | base64 | tr '+/' '-_' | tr -d '=\n')
curl -sS --fail "${AUTH[@]}" "${JSON[@]}" "$URL/v1/completions" \
  -d "{\"model\": \"$BASE+$INLINE\", \"prompt\": \"The capital of France is\", \"max_tokens\": 8, \"temperature\": 0}"; echo

echo '# a chat, streamed'
curl -sS --fail -N "${AUTH[@]}" "${JSON[@]}" "$URL/v1/chat/completions" \
  -d "{\"model\": \"$BASE\", \"messages\": [{\"role\": \"user\", \"content\": \"What is the capital of France?\"}], \"max_tokens\": 16, \"temperature\": 0, \"stream\": true}"

echo '# back out as a PEFT checkpoint'
curl -sS --fail "${AUTH[@]}" "$URL/adapters/alice/weights?format=peft" -o /tmp/alice-peft.zip && ls -l /tmp/alice-peft.zip

echo '# and gone'
curl -sS --fail "${AUTH[@]}" -X DELETE "$URL/adapters/alice" -o /dev/null -w '%{http_code}\n'
