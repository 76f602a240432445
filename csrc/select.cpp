// Choosing tokens: the same choices as vllm_kvcrush/ops/reference.py, ties to the lower slot.
#include "internal.h"
