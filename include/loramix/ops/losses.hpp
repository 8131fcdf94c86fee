/// All losses and telemetry.
///
/// Computes:    what the headers below say.
/// Reads / Writes / Adds to: see there.
/// Errors:      see there.
/// Cost:        see there.
/// Determinism: ops/loss.hpp
/// Example:     tests/ops/losses.cpp
#pragma once
#include <loramix/ops/balance_loss.hpp>
#include <loramix/ops/contrastive_loss.hpp>
#include <loramix/ops/squared_error.hpp>
#include <loramix/ops/telemetry.hpp>
