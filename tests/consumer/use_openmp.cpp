#include <loramix/cpu/openmp.hpp>

#include "add_lora.hpp"

int main() { return add_lora(loramix::cpu::Backend{loramix::OpenMPExecutor{2}}); }
