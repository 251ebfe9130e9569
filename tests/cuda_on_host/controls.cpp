// What a test may ask of the executor, through ctypes.
#include "cuda_runtime.h"

extern "C" {
void cuda_on_host_set_seed(unsigned seed) { cuda_on_host::Executor::instance().set_seed(seed); }
void cuda_on_host_fail_next_launch() { cuda_on_host::fail_next_launch = true; }
}
