#include "add_lora.hpp"

int main() { return add_lora(loramix::cpu::Backend{}); }
