/*
 * memory.h - how much memory this process may use: the machine's, or less where its cgroup (a
 * container) says so.
 */
#ifndef BPO_MEMORY_H
#define BPO_MEMORY_H

#include <stddef.h>

/* Bytes that can still be allocated and used without swapping or being killed; SIZE_MAX when the
 * system does not say. */
size_t memory_available(void);

/* Bytes of memory in all, used or not; SIZE_MAX when the system does not say. */
size_t memory_total(void);

#endif
