/*
 * cgroup.h - the Linux cgroups that this process is in: where a container's limits are found.
 */
#ifndef BPO_BASE_CGROUP_H
#define BPO_BASE_CGROUP_H

/* Called for one cgroup: its directory, without a slash at the end, and the version (1 or 2) of its
 * hierarchy, which decides what the files in it are called. */
typedef void cgroup_fn(void *arg, const char *folder, int version);

/* Calls fn for the cgroups of this process that have a controller ("cpu", "memory"), and for all of
 * their parents, whose limits hold too. Not at all where there are no cgroups. */
void cgroup_for_each(const char *controller, cgroup_fn *fn, void *arg);

#endif
