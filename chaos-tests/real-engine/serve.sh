#!/bin/bash
# Serves the tiny model with the vLLM that install.sh installed, on loopback only, with KV events.
#
#   serve.sh DIR RUN PORT BLOCKS ENDPOINT REPLAY TOPIC
#
# RUN is a folder for what it writes. ENDPOINT, of the events: ipc://FILE or tcp://*:0 (any port
# of VLLM_HOST_IP), where it listens; tcp://127.0.0.1:PORT, to which it connects. REPLAY: where
# it listens for questions. KV_TRANSFER in the environment: the configuration of a KV connector. It ends when its standard input does, and takes what it started with it;
# for that it must lead a process group.
set -euo pipefail
dir=$1 run=$2 port=$3 blocks=$4 endpoint=$5 replay=$6 topic=$7
exec 3<&0
{ cat <&3 > /dev/null; kill -KILL 0; } &

# Nothing is asked of or told to the world.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export VLLM_HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME=lo
# One thread an engine, and no core for itself: tests share theirs.
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 VLLM_CPU_NUM_OF_RESERVED_CPU=0
# For /reset_prefix_cache.
export VLLM_SERVER_DEV_MODE=1
export PYTHONHASHSEED=0 TORCHINDUCTOR_CACHE_DIR=$run/inductor VLLM_CACHE_ROOT=$run/cache

# KV that is handed to another engine goes over loopback.
export VLLM_NIXL_SIDE_CHANNEL_HOST=127.0.0.1 UCX_NET_DEVICES=lo UCX_TLS=tcp,self,sm UCX_LOG_LEVEL=error
shares=()
if [ -n "${KV_TRANSFER:-}" ]; then
    shares=(--kv-transfer-config "$KV_TRANSFER")
    # NIXL wants CUDA's libraries by name: real ones, or those that stub_cuda.py has made.
    site=$dir/lib/python3.11/site-packages
    LD_LIBRARY_PATH=$site/torch/lib
    for libraries in "$site"/nvidia/*/lib; do
        [ ! -d "$libraries" ] || LD_LIBRARY_PATH=$LD_LIBRARY_PATH:$libraries
    done
    export LD_LIBRARY_PATH
fi

# Attention on CPUs wants blocks of a multiple of 32.
exec "$dir/bin/python" -m vllm.entrypoints.cli.main serve "$dir/tiny-model" --served-model-name tiny \
    --host 127.0.0.1 --port "$port" --dtype float32 --enforce-eager --max-model-len 2048 --max-num-seqs 16 \
    --block-size 32 --num-gpu-blocks-override "$blocks" --enable-prefix-caching \
    --enable-prompt-tokens-details --disable-uvicorn-access-log --kv-events-config \
    "{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"$endpoint\",\"replay_endpoint\":\"$replay\",\"topic\":\"$topic\",\"buffer_steps\":10000}" \
    "${shares[@]}" < /dev/null
