#!/bin/sh
# demo.sh BPO - rewrites three prompts with the bundled demo model. The seed is fixed, so everybody
# sees the same texts.
set -eu
bpo=$1
model=$(dirname "$0")/../demo/bpo-demo.bin

echo
echo "bpo with its bundled demo model, a toy trained on made-up pairs to show that it all works."
echo "Good rewrites need the real model: see README.md."
for prompt in "Tell me about Harry Potter" "How do I fix a leaking tap?" \
    "Write a short poem about the sea for my grandmother"; do
    printf '\nprompt:    %s\n' "$prompt"
    printf 'rewritten: %s\n' "$("$bpo" -q -m "$model" -p "$prompt" --seed 1)"
done
echo
