#!/usr/bin/env bash
# From no file at all to generated text: what `make demo` runs, and what you would type yourself.
set -euo pipefail
run=runs/demo bundle=bundles/demo state=bundles/demo.state
rm -rf "$run" "$bundle" "$state" # a run never writes over another

say() { printf '\n$%s\n' "$(printf ' %q' "$@")"; "$@"; }
kilobytes() { echo $((($(cat "$@" | wc -c) + 512) / 1024)); }

# The text is the language reference that Python carries; name files in place of it to train on your own.
say sdgm-edge train --preset edge-nano --vocab-size 2048 --epochs 16 --out "$run"
say sdgm-edge export "$run" --quantize --out "$bundle"
say sdgm-edge verify "$bundle"
say sdgm-edge -v generate -m "$bundle" -p "The following" -n 120 --temp 0.7 -s 2 --state "$state"

printf '\n\nThat took %d seconds. On a device it needs %d KB for the bundle, of which the model is %d KB,\n' \
    "$SECONDS" "$(kilobytes "$bundle"/*)" "$(kilobytes "$bundle"/*.onnx)"
printf 'and %d KB for all that it remembers of a text, however long. To go on with this one:\n\n' \
    "$(kilobytes "$state")"
printf '$ sdgm-edge generate -m %s --state %s\n' "$bundle" "$state"
