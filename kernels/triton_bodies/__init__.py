"""The kernels' bodies in Triton, by the names of the functions whose contracts they keep.

Importing them needs Triton; `bodies.triton_runs` says where that is safe. NaN and infinities come
out as torch's bodies let them; sums are in fp32 whatever the inputs are. Written for Triton 3.6;
strides come in tuples, which early versions do not take.
"""
