#!/bin/sh
# Run smoke tests with the lowest and the highest versions of the dependencies that pyproject.toml allows.
# Each set is installed into a virtual environment of its own, which takes some minutes and about 5 GB.
#   tests/versions.sh [lowest] [highest]      PYTHON=python3.11 by default the first python3
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/tools"
"$work/tools/bin/python" -m pip install --quiet uv
export HF_HUB_OFFLINE=1 WANDB_MODE=offline

for set in "${@:-lowest highest}"; do
    for versions in $set; do
        case $versions in
            lowest) resolution=lowest-direct ;;
            highest) resolution=highest ;;
            *) echo "$versions: expected lowest or highest" >&2; exit 2 ;;
        esac
        echo "== $versions versions that pyproject.toml allows"
        "$work/tools/bin/uv" venv --quiet --python "$python" "$work/$versions"
        "$work/tools/bin/uv" pip install --quiet --python "$work/$versions" --resolution "$resolution" -e ".[dev]"
        "$work/tools/bin/uv" pip list --quiet --python "$work/$versions" \
            | grep -E '^(torch|transformers|diffusers|hydra-core|wandb|safetensors) '
        # loading and saving (transformers, diffusers), sampling (torch), one run (hydra) with a tracker (wandb)
        "$work/$versions/bin/python" -m pytest -q -p no:cacheprovider \
            tests/numerics/test_checkpoints_text.py tests/unit/test_recognise.py tests/unit/test_schedules.py \
            tests/unit/test_pipeline.py tests/unit/test_flux.py tests/numerics/test_diffusers.py \
            tests/numerics/test_compiled_model.py
        "$work/$versions/bin/python" -m fluxlab.run +exp=hello steps=2 seeds=1 tracking=wandb "out=$work/$versions-run"
    done
done
