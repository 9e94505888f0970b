#!/bin/sh
# demo.sh BPO - three prompts, rewritten by the bundled demo model. The seed is fixed: everybody sees the same texts.
set -eu
bpo=$1
model=$(dirname "$0")/../demo/bpo-demo.bin

echo
echo "bpo with its bundled demo model: tiny, and trained on made-up pairs, it shows that everything works."
echo "Good rewrites need the real model: see README.md."
for prompt in "Tell me about Harry Potter" "How do I fix a leaking tap?" \
    "Write a short poem about the sea for my grandmother"; do
    printf '\nprompt:    %s\n' "$prompt"
    printf 'rewritten: %s\n' "$("$bpo" -q -m "$model" -p "$prompt" --seed 1)"
done
echo
