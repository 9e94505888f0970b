/*
 * backend.h - finds the op table of a GPU. It stands in a library of its own, bpo_cuda.so, because
 * CUDA's libraries are large and most machines have none: it is opened when a session asks for it,
 * and one program works with and without.
 */
#ifndef BPO_BACKEND_H
#define BPO_BACKEND_H

#include <stdbool.h>

#include "kernels.h"

/* The op table of bpo_cuda.so, which lives as long as the process; or NULL and the reason
 * (BPO_ERR_RESOURCE). *found says whether there is such a library. It is looked for beside the
 * program and in ../lib/bpo and the install's lib/bpo, never in the working directory; the
 * environment's BPO_CUDA_SO names another one, or "none". */
const struct kernels *backend_cuda(bool *found, struct bpo_error *err);

#endif
