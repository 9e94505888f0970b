/*
 * program.h - where the running program is.
 */
#ifndef BPO_BASE_PROGRAM_H
#define BPO_BASE_PROGRAM_H

#include <stdbool.h>
#include <stddef.h>

/* The folder of the running program's file, without a slash at its end, in folder [n_bytes]. argv0
 * is main's argv[0] where the system does not name the file itself, or NULL. False: unknown. */
bool program_folder(char *folder, size_t n_bytes, const char *argv0);

#endif
