"""Noise or cells in, cells out."""

from .augment import augment
from .observed_genes import ObservedGenes
from .pipeline_output import ScRNAPipelineOutput
from .pipeline_scrna_generation import ScRNAGenerationPipeline
from .pipeline_scrna_inpaint import ScRNAInpaintPipeline
from .pipeline_scrna_to_scrna import ScRNAToScRNAPipeline
from .pipeline_utils import ScRNAPipeline


__all__ = ["ObservedGenes", "ScRNAGenerationPipeline", "ScRNAInpaintPipeline", "ScRNAPipeline"]
__all__ += ["ScRNAPipelineOutput", "ScRNAToScRNAPipeline", "augment"]
