set -e
cd /work/cuda/kernels/cuda; O=/tmp/cu_all; mkdir -p $O
F="-std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -Xcompiler -fPIC,-fvisibility=hidden -I../include"
t=$(date +%s)
ls *.cu | xargs -P 2 -I{} sh -c "nice -n 5 nvcc $F -Xptxas -v -c {} -o $O/{}.o > $O/{}.log 2>&1 || cat $O/{}.log | grep error"
nvcc -shared --cudart=shared -o /work/main/.carry/cuda/libflute.so $O/*.o
echo built in $(( $(date +%s) - t )) s; ls -la /work/main/.carry/cuda/libflute.so; grep -h spill $O/*.log | sort | uniq -c
