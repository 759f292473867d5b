#!/usr/bin/env bash
# Training on a JSONL file: upload it, train an adapter on it while the server serves, watch, ask the adapter.
# Start the server first: cargo run --release -- serve --no-auth
# Your own file: examples/train.sh my.jsonl, items {"messages": [..], "answer": ..} (the grader below compares numbers).
set -euo pipefail
URL=${MOTE_URL:-http://127.0.0.1:8080}
AUTH=(-H "authorization: Bearer ${MOTE_API_KEY:-no-key-needed}")
JSON=(-H 'content-type: application/json')
field() { python3 -c 'import json,sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }

DATA=${1:-}
if [ -z "$DATA" ]; then
  DATA=$(mktemp --suffix .jsonl)
  for a in 1 2 3 4 5 6 7 8; do for b in 1 3 5 7; do
    printf '{"messages": [{"role": "user", "content": "What is %d + %d? Answer with the number."}], "answer": %d}\n' "$a" "$b" $((a + b))
  done; done > "$DATA"
fi

echo '# the file: every line is checked'
FILE=$(curl -sS --fail-with-body "${AUTH[@]}" "$URL/v1/files" -F purpose=fine-tune -F "file=@$DATA" | field id)
echo "$FILE"

echo '# the job'
JOB=$(curl -sS --fail-with-body "${AUTH[@]}" "${JSON[@]}" "$URL/adapters/train" -d '{
  "name": "sums", "on_conflict": "new_generation", "method": "grpo", "training_file": "'"$FILE"'",
  "grader": {"type": "number", "reference": "{{item.answer}}"},
  "hyperparameters": {"steps": 20, "prompts_per_step": 6, "samples_per_prompt": 6, "max_completion_tokens": 24}}' | field id)
echo "$JOB"

echo '# its events, until it has ended (a stream that breaks goes on with -H "Last-Event-ID: N")'
curl -sS --fail-with-body -N "${AUTH[@]}" -H 'accept: text/event-stream' "$URL/adapters/train/$JOB/events"

echo '# what became of it'
STATUS=$(curl -sS --fail-with-body "${AUTH[@]}" "$URL/adapters/train/$JOB" | field status)
echo "$STATUS"
[ "$STATUS" = succeeded ]

echo '# the adapter answers'
curl -sS --fail-with-body "${AUTH[@]}" "${JSON[@]}" "$URL/v1/chat/completions" -d '{
  "model": "sums", "messages": [{"role": "user", "content": "What is 6 + 9? Answer with the number."}], "max_tokens": 24, "temperature": 0}'; echo
