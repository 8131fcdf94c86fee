/// Everything but the backends: adapters, their ops, training. Engines include what they use; examples include this and
/// one backend: <loramix/cpu/cpu.hpp> or <loramix/gpu/gpu.cuh>.
#pragma once
#include <loramix/adapter/explain.hpp>
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/fused_forward.hpp>
#include <loramix/adapter/fused_lora.hpp>
#include <loramix/adapter/hydra_lora.hpp>
#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/adapter/lora_moe.hpp>
#include <loramix/adapter/merge.hpp>
#include <loramix/adapter/mix_lora_forward.hpp>
#include <loramix/adapter/mola.hpp>
#include <loramix/adapter/pack.hpp>
#include <loramix/adapter/shapley.hpp>
#include <loramix/adapter/team_lora.hpp>
#include <loramix/core/thread_pool.hpp>
#include <loramix/core/version.hpp>
#include <loramix/gate/gates.hpp>
#include <loramix/gate/softmax.hpp>
#include <loramix/ops/losses.hpp>
#include <loramix/train/adamw.hpp>
#include <loramix/train/clip.hpp>
#include <loramix/train/schedule.hpp>
#include <loramix/train/sgd.hpp>
