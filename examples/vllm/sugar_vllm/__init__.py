"""A plugin that gives vLLM the model of an export whose images are embedded by the mean over their tokens."""


def register():
    from vllm import ModelRegistry

    name = "SugarLlavaForConditionalGeneration"  # `architectures` in the export's config.json
    ModelRegistry.register_model(name, f"sugar_vllm.model:{name}")
