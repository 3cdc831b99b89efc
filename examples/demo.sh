#!/usr/bin/env bash
# From no file at all to generated text: what `make demo` runs, and what you would type yourself.
set -euo pipefail
run=runs/demo bundle=bundles/demo
rm -rf "$run" "$bundle" # a run never writes over another

say() { printf '\n$ %s\n' "$*"; "$@"; }

# The text is the language reference that Python carries; name files in place of it to train on your own.
say sdgm-edge train --preset edge-nano --epochs 16 --out "$run"
say sdgm-edge export "$run" --quantize int8 --out "$bundle"
say sdgm-edge verify "$bundle"
say sdgm-edge generate --model "$bundle" --prompt "The following" --max-new-tokens 120 --temperature 0.7 --seed 1
