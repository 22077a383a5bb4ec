#!/usr/bin/env bash
# Build the wheel, install it into an empty folder, and run its doc examples from there.
set -euo pipefail
python=$1
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m build --wheel --no-isolation --outdir "$work" . > "$work/build.log" || { cat "$work/build.log"; exit 1; }
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$work/site" "$work"/*.whl
cd "$work"
export PYTHONPATH=$work/site
"$python" -c "
import dgc, pathlib
assert pathlib.Path(dgc.__file__).is_relative_to('$work'), dgc.__file__
assert (pathlib.Path(dgc.__file__).parent / 'py.typed').exists()"
"$python" -m pytest --quiet -p no:cacheprovider --doctest-modules --rootdir "$work" site/dgc
