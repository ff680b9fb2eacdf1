"""The model, its configuration and its processor. Importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .configuration_sugar import SugarConfig
from .modeling_sugar import SugarForConditionalGeneration, SugarOutput
from .processing_sugar import SugarProcessor


AutoConfig.register("sugar", SugarConfig)
AutoModel.register(SugarConfig, SugarForConditionalGeneration)
AutoModelForImageTextToText.register(SugarConfig, SugarForConditionalGeneration)
AutoModelForMultimodalLM.register(SugarConfig, SugarForConditionalGeneration)
AutoProcessor.register(SugarConfig, SugarProcessor)

__all__ = ["SugarConfig", "SugarForConditionalGeneration", "SugarOutput", "SugarProcessor"]
