#ifndef BPO_CPU_H
#define BPO_CPU_H
#include "cpu/levels.h"
#endif
