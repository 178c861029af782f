#!/bin/sh
# Run the numerics and integration tiers as several kinds of processors would compute them.
#
#     tests/processors.sh [pytest arguments; default: tests/numerics tests/integration]
#
# PyTorch, MKL and oneDNN choose their kernels by the processor. These variables make them choose the kernels of an older
# processor, so that a test that depends on the last bit of one vector library fails here and not on another machine.
# Each library runs with one and with two threads. On AMD processors MKL ignores its variable.
PYTHON="${PYTHON:-python3}"
[ $# -gt 0 ] || set -- tests/numerics tests/integration -m "not soak"
failed=""
while read -r threads settings; do
    echo "== ${settings:-as this processor is}, $threads thread(s)"
    # shellcheck disable=SC2086
    env $settings OMP_NUM_THREADS="$threads" MKL_NUM_THREADS="$threads" "$PYTHON" -m pytest "$@" < /dev/null ||
        failed="$failed
   $settings, $threads thread(s)"
done << 'SETTINGS'
1 ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2
2 ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=AVX2
1 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=SSE4_2
1 ONEDNN_MAX_CPU_ISA=AVX2
2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
SETTINGS
[ -z "$failed" ] || { echo "failed with:$failed"; exit 1; }
echo "all settings pass"
