"""LLaVA-1.5 with the pooling of `hf_sugar.models.modeling_sugar.pool_slices`."""

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import DispatchPooler, PoolingParamsUpdate
from vllm.model_executor.layers.pooler.seqwise import SequencePoolingMethod, pooler_for_embed
from vllm.model_executor.models.adapters import as_embedding_model
from vllm.model_executor.models.llava import LlavaForConditionalGeneration


class SlicePool(SequencePoolingMethod):
    """
    The last slice of each prompt: the mean over the image tokens that it ends with, or its last token where it ends with a
    text. The chat template of the export ends a prompt there, and puts a line break between two images.
    """

    def __init__(self, image_token_id: int):
        super().__init__()
        self.image_token_id = image_token_id

    def get_supported_tasks(self):
        return {"embed"}

    def get_pooling_updates(self, task):
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states, pooling_metadata):
        cursor = pooling_metadata.get_pooling_cursor()
        if cursor.is_partial_prefill():
            raise RuntimeError("The mean over an image needs all its tokens at once: chunked prefill must be off.")
        pooled = []
        prompts = hidden_states.split(cursor.num_scheduled_tokens_cpu.tolist())
        for states, token_ids in zip(prompts, pooling_metadata.get_prompt_token_ids_cpu(), strict=True):
            others = (token_ids != self.image_token_id).nonzero()
            start = int(others[-1]) + 1 if len(others) else 0
            pooled.append(states[min(start, len(states) - 1) :].float().mean(dim=0))
        return torch.stack(pooled)


class SugarLlavaForConditionalGeneration(as_embedding_model(LlavaForConditionalGeneration)):
    """The head is vLLM's own: it reads the export's Dense modules, and normalises."""

    def _init_pooler(self, vllm_config: VllmConfig, prefix: str = ""):
        config = vllm_config.model_config.hf_config
        if config.sugar_embedding["image_pooling"] != "mean":
            raise ValueError(
                "The export's `image_pooling` is not 'mean', and this plugin has no other. Export it again."
            )
        pooler = pooler_for_embed(vllm_config.model_config.pooler_config)
        pooler.pooling = SlicePool(config.image_token_index)
        return DispatchPooler({"embed": pooler})
