# Sourced with packages as arguments: a new environment with them in a temporary folder, which goes when the script ends.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
PATH="$folder/environment/bin:$PATH"
pip --disable-pip-version-check install -q "$@" 2> "$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
pip freeze | grep -iE "^($(printf '%s\n' "$@" | sed 's/==.*//' | paste -sd'|'))=="
export HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 OMP_NUM_THREADS=1
cd "$folder"
