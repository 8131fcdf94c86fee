/// Everything the CPU backend does. Needs Eigen 3.4; threads are the caller's (cpu/openmp.hpp, core/thread_pool.hpp).
#pragma once
#include <loramix/cpu/backend.hpp>
#include <loramix/cpu/mixlora.hpp>
#include <loramix/cpu/product.hpp>
#include <loramix/cpu/rows.hpp>
#include <loramix/cpu/small_product.hpp>
