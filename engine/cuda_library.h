/*
 * cuda_library.h - finds and opens bpo_cuda.so, which holds the op table of NVIDIA GPUs.
 *
 * It is a library apart because CUDA's own libraries are large and most machines have none: it is
 * opened when a session asks for a GPU, and one program works with it and without it.
 */
#ifndef BPO_ENGINE_CUDA_LIBRARY_H
#define BPO_ENGINE_CUDA_LIBRARY_H

#include <stdbool.h>

#include "kernels.h"

/* The op table of bpo_cuda.so, which lives as long as the process; or NULL and the reason
 * (BPO_ERR_RESOURCE). *found says whether there is such a library. It is searched for beside the
 * program, in ../lib/bpo and in the installation's lib/bpo, never in the working directory; the
 * environment variable BPO_CUDA_SO names another file, or "none". */
const struct kernels *backend_cuda(bool *found, struct bpo_error *err);

#endif
