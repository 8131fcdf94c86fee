"""The same small layers by PEFT itself: forward and gradients in float64, dropout by a mask that we hand it."""

import types

import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, inject_adapter_in_model
from peft.tuners.adalora import RankAllocator


class Mask(torch.nn.Module):
    """Stands where PEFT has its nn.Dropout."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


class Net(torch.nn.Module):
    def __init__(self, W):
        super().__init__()
        self.f = torch.nn.Linear(W.shape[1], W.shape[0], bias=False).double()
        self.f.weight.data.copy_(W)


def layer_of(config, W):
    layer = inject_adapter_in_model(config, Net(W)).f
    return layer.double().train()


def run(layer, x, dy, W, leaves):
    """ΔY and gradients; the base's share of dX and y is taken away."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * dy).sum().backward()
    out = {"y": (y - x @ W.T).detach(), "d.x": x.grad - dy @ W}
    for name, parameter in leaves.items():
        out["d." + name] = parameter.grad
    return out


def put(parameter, value):
    parameter.data.copy_(value.reshape(parameter.shape))


def lora(p, dy, mask, r, alpha, rslora=False):
    W = torch.zeros(p["lora_B.weight"].shape[0], p["x"].shape[1])
    layer = layer_of(LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, target_modules=["f"]), W)
    put(layer.lora_A["default"].weight, p["lora_A.weight"])
    put(layer.lora_B["default"].weight, p["lora_B.weight"])
    layer.lora_dropout["default"] = Mask(mask)
    return run(layer, p["x"], dy, W,
               {"lora_A.weight": layer.lora_A["default"].weight, "lora_B.weight": layer.lora_B["default"].weight})


def dora(p, dy, mask, r, alpha):
    W = p["W"]
    layer = layer_of(LoraConfig(r=r, lora_alpha=alpha, use_dora=True, target_modules=["f"]), W)
    put(layer.lora_A["default"].weight, p["lora_A.weight"])
    put(layer.lora_B["default"].weight, p["lora_B.weight"])
    magnitude = layer.lora_magnitude_vector["default"].weight
    put(magnitude, p["lora_magnitude_vector.weight"])
    layer.lora_dropout["default"] = torch.nn.Identity() if bool((mask == 1).all()) else Mask(mask)
    out = run(layer, p["x"], dy, W,
              {"lora_A.weight": layer.lora_A["default"].weight, "lora_B.weight": layer.lora_B["default"].weight,
               "lora_magnitude_vector.weight": magnitude})
    name = "d.lora_magnitude_vector.weight"
    out[name] = out[name].reshape(1, -1)
    return out


def ada_layer(A, B, E, r, alpha):
    W = torch.zeros(B.shape[0], A.shape[1])
    layer = layer_of(AdaLoraConfig(init_r=r, target_r=r, lora_alpha=alpha, target_modules=["f"], total_step=100), W)
    put(layer.lora_A["default"], A)
    put(layer.lora_B["default"], B)
    put(layer.lora_E["default"], E)
    return layer, W


def ada_lora(p, dy, mask, r, alpha):
    layer, W = ada_layer(p["lora_A.weight"], p["lora_B.weight"], p["lora_E"], r, alpha)
    layer.lora_dropout["default"] = Mask(mask)
    out = run(layer, p["x"], dy, W, {"lora_A.weight": layer.lora_A["default"], "lora_B.weight": layer.lora_B["default"],
                                     "lora_E": layer.lora_E["default"]})
    out["d.lora_E"] = out["d.lora_E"].reshape(1, -1)
    return out


def orthogonality(p, second, r):
    """The regulariser as PEFT's AdaLoraModel.forward adds it, without its weight."""
    from peft import AdaLoraModel

    class Two(torch.nn.Module):
        config = types.SimpleNamespace(model_type="none", to_dict=lambda: {})

        def __init__(self):
            super().__init__()
            d, o = p["lora_A.weight"].shape[1], p["lora_B.weight"].shape[0]
            self.a, self.b = torch.nn.Linear(d, o, bias=False), torch.nn.Linear(d, o, bias=False)

        def forward(self, x):
            return types.SimpleNamespace(loss=(self.a(x) + self.b(x)).sum() * 0)

    config = AdaLoraConfig(init_r=r, target_r=r, lora_alpha=3, target_modules=["a", "b"], total_step=100,
                           orth_reg_weight=1.0)
    model = AdaLoraModel(Two(), {"default": config}, "default").double()
    for name, A, B in [("a", p["lora_A.weight"], p["lora_B.weight"]), ("b", second["second.A"], second["second.B"])]:
        layer = getattr(model.model, name)
        put(layer.lora_A["default"], A)
        put(layer.lora_B["default"], B)
    return model(p["x"]).loss.detach()


def budget(b0, bT, total, initial, final):
    """b(n) of PEFT's RankAllocator for n = 0 … total."""
    allocator = object.__new__(RankAllocator)
    allocator.init_bgt, allocator.target_bgt = b0, bT
    allocator.peft_config = types.SimpleNamespace(tinit=initial, tfinal=final, total_step=total, deltaT=1)
    return [allocator.budget_schedule(n)[0] for n in range(total + 1)]


def ia3(p, dy, feedforward):
    W = p["W"]
    layer = layer_of(IA3Config(target_modules=["f"], feedforward_modules=["f"] if feedforward else []), W)
    put(layer.ia3_l["default"], p["ia3_l"])
    out = run(layer, p["x"], dy, W, {"ia3_l": layer.ia3_l["default"]})
    out["d.ia3_l"] = out["d.ia3_l"].reshape(1, -1)
    return out


def prompt(p, dy):
    """PeftModel's own concatenation, over a base model that returns its embeddings."""
    from peft import PeftModelForFeatureExtraction, PromptTuningConfig
    from transformers import PretrainedConfig, PreTrainedModel

    rows, width = p["prompt_embeddings"].shape

    class Base(PreTrainedModel):
        config_class = PretrainedConfig
        all_tied_weights_keys = {}

        def __init__(self):
            super().__init__(PretrainedConfig(vocab_size=11))
            self.word = torch.nn.Embedding(11, width)

        def get_input_embeddings(self):
            return self.word

        def forward(self, inputs_embeds=None, **_):
            return inputs_embeds

    config = PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=rows, token_dim=width, num_layers=1,
                                num_attention_heads=1, num_transformer_submodules=1)
    model = PeftModelForFeatureExtraction(Base(), config).double()
    weight = model.prompt_encoder["default"].embedding.weight
    put(weight, p["prompt_embeddings"])
    x = p["x"].clone().requires_grad_()
    y = model(inputs_embeds=x.reshape(2, -1, width)).reshape(-1, width)
    (y * dy).sum().backward()
    return {"y": y.detach(), "d.x": x.grad, "d.prompt_embeddings": weight.grad}
