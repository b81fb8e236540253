# dev build: one arch, parallel objects
set -e
cd /work/cuda/kernels/cuda; O=/tmp/cu_obj_${NAME:-dev}; mkdir -p $O
F="-std=c++17 -O3 -lineinfo $* -gencode arch=compute_90a,code=sm_90a -Xcompiler -fPIC,-fno-gnu-unique -I../include"
for f in repack api decode_w4 $EXTRA; do nice -n 5 nvcc $F -Xptxas -v -c $f.cu -o $O/$f.o > $O/$f.log 2>&1 & done; wait
cat $O/*.log | c++filt | grep -E "error|warning|registers|spill|Compiling" | sed 's/ptxas info    ://' | head -${LINES_MAX:-40}
mkdir -p /work/main/.carry/cuda
nvcc -shared --cudart=shared -o /work/main/.carry/cuda/libflute_${NAME:-dev}.so $O/repack.o $O/api.o $O/decode_w4.o $(for e in $EXTRA; do echo $O/$e.o; done)
