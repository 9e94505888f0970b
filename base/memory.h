/*
 * memory.h - how much memory this process may use: the machine's, or less if a cgroup (a container)
 * limits it.
 */
#ifndef BPO_BASE_MEMORY_H
#define BPO_BASE_MEMORY_H

#include <stddef.h>

/* Bytes that can still be allocated and used without swapping or being killed; SIZE_MAX if the
 * system does not tell. */
size_t memory_available(void);

/* Bytes of memory in all, used or not; SIZE_MAX if the system does not tell. */
size_t memory_total(void);

#endif
