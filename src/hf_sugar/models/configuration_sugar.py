from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


# Where the Auto classes find the code in a repository. The configuration is taken from the module of the model, which
# imports it: by its own name, transformers would import a second copy of it for local directories.
AUTO_MAP = {
    "AutoConfig": "modeling_sugar.SugarConfig",
    "AutoModel": "modeling_sugar.SugarForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_sugar.SugarForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_sugar.SugarForConditionalGeneration",
}


class SugarConfig(PreTrainedConfig):
    r"""
    Configuration of a [`SugarForConditionalGeneration`]: any image-text-to-text backbone and a retrieval projector.

    Pointed at a plain backbone checkpoint, `from_pretrained` nests the backbone's own configuration, so a LLaVA
    directory or Hub id can be used as it is.

    Args:
        vlm_config (`PreTrainedConfig` or `dict`, *optional*): configuration of the backbone. Defaults to LLaVA-1.5.
        retrieval_dim (`int`, *optional*, defaults to `768`): size of the embeddings.
        retrieval_hidden_size (`int`, *optional*):
            Width of the projector's hidden layer. Defaults to the backbone's hidden size.
        image_pooling (`"mean"` or `"last"`, *optional*, defaults to `"mean"`):
            What represents an image slice: the mean of the hidden states of its tokens, or the last one (the "w/o
            AvgPool" ablation of the [paper](https://huggingface.co/papers/2411.00304)).
        matryoshka_dims (`list[int]`, *optional*):
            Lengths to which the embeddings are trained to be cut, the whole one among them.
        initializer_range (`float`, *optional*):
            Standard deviation of the projector's initial weights. Defaults to one over the square root of the
            backbone's hidden size: much less would make the embeddings so short that normalising them blows up the
            gradient.
        random_projector (`bool`, *optional*, defaults to `False`):
            Whether the projector is as it was made: so it is where a plain backbone is loaded or wrapped, until [`SugarTrainer`]
            trains it. A training loop of your own sets it to `False`. Commands refuse to embed with such a model, and
            [`SugarEmbedder`] warns.
        rerank_prompt (`str`, *optional*):
            What a reranker asks of a `{query}` and a `{document}`, in a model that was taught to answer "yes" or "no". Others
            rerank by the likelihood of the query after the document.
        query_instruction, document_instruction (`str`, *optional*):
            What is said to the model, as its system message, before a query and before a document that it embeds.
        backbone_name_or_path, backbone_revision (`str`, *optional*):
            Set in an adapter repository: where the backbone's weights are, and their commit.
        backbone_fingerprint (`str`, *optional*):
            Set in an adapter repository: tells another backbone of the same shapes from it.
    """

    model_type = "sugar"
    _auto_class = "AutoConfig"  # saved with its code
    _commit_hash = None  # of the repository that the weights came from; never saved
    sub_configs_defaults = {"vlm_config": SubConfigSpec(config_class=AutoConfig, model_type="llava")}

    vlm_config: dict | PreTrainedConfig | None = None
    retrieval_dim: int = 768
    retrieval_hidden_size: int | None = None
    image_pooling: str = "mean"
    matryoshka_dims: list[int] | None = None
    initializer_range: float | None = None
    random_projector: bool = False
    rerank_prompt: str | None = None
    query_instruction: str | None = None
    document_instruction: str | None = None
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    backbone_fingerprint: str | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.image_pooling not in ("mean", "last"):
            raise ValueError(f"`image_pooling` is {self.image_pooling!r}; it must be 'mean' or 'last'.")
        prompt = self.rerank_prompt
        if prompt is not None and (prompt.count("{query}") != 1 or prompt.count("{document}") != 1):
            raise ValueError(f"`rerank_prompt` {prompt!r} needs {{query}} and {{document}}, once each.")
        if self.initializer_range is None:
            self.initializer_range = self.get_text_config().hidden_size ** -0.5
        # read on the outer configuration of a composite model too
        self.tie_word_embeddings = bool(self.vlm_config.tie_word_embeddings)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        return self.vlm_config.get_text_config(*args, **kwargs)

    @property
    def image_token_id(self) -> int:
        return self.vlm_config.image_token_id

    @property
    def text_config(self) -> PreTrainedConfig:
        return self.vlm_config.get_text_config()

    @property
    def vision_config(self) -> PreTrainedConfig:
        return self.vlm_config.vision_config

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "auto_map": AUTO_MAP}

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        # Without this, pointing at a plain or damaged checkpoint would silently build the default 7B with random weights.
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type") not in (None, cls.model_type):
            config = {"model_type": cls.model_type, "random_projector": True, "vlm_config": config}
        if not config.get("vlm_config"):
            raise OSError(
                f"{pretrained_model_name_or_path} has no config.json of a model: it is missing or damaged. Download it again."
            )
        return config, kwargs
