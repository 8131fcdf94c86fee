/// Everything the GPU backend does. Needs nvcc and cuBLAS, no flag of nvcc's; streams and memory are the caller's.
#pragma once
#include <loramix/gpu/adapter.cuh>
#include <loramix/gpu/backend.cuh>
#include <loramix/gpu/buffer.cuh>
#include <loramix/gpu/mixlora.cuh>
#include <loramix/gpu/plan.cuh>
#include <loramix/gpu/product.cuh>
#include <loramix/gpu/rows.cuh>
#include <loramix/gpu/status.cuh>
#include <loramix/gpu/team.cuh>
