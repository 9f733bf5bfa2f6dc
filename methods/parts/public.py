"""Every public name of `methods.parts`: what a method's file, a recipe or a notebook imports from there."""

from __future__ import annotations

from methods.parts import ema
from methods.parts.assignment import sinkhorn
from methods.parts.backbones import BackboneConfig, build_backbone, num_features
from methods.parts.centering import Center
from methods.parts.contract import (
    Masks, Method, MethodConfig, Outputs, ParamGroup, Progress, RunFacts, StepOutput, find, register, registered,
)  # fmt: skip
from methods.parts.contrast import contrast_meters, info_nce, info_nce_with_queue
from methods.parts.counter_random import draw_seed, random_words
from methods.parts.dino_head import DINOHead, Prototypes
from methods.parts.distributed import (
    all_gather_rows, all_reduce_max, all_reduce_sum, gather_with_gradient, own_columns, rank, world_size,
)  # fmt: skip
from methods.parts.drop_path import without_drop_path
from methods.parts.ema import MomentumTeacher
from methods.parts.errors import ConfigError, require
from methods.parts.fields import SearchRange, at_least, below_one, fraction, limited, positive, searchable
from methods.parts.groups import param_groups_by_layer, param_groups_weight_decay
from methods.parts.heads import mlp, trunc_normal_linears
from methods.parts.hints import (
    LARGER_BATCH, LOWER_RATE, Hints, blunt_targets, faster_average, many_clusters, one_of, queue_beyond_images, queue_filled_late,
    slow_average, told,
)  # fmt: skip
from methods.parts.losses import gram_loss, koleo, sigreg
from methods.parts.masking import hidden_by, masked_of, num_kept, num_patches, num_patches_of_side, random_keep
from methods.parts.memory_bank import MemoryBank, first_places
from methods.parts.meters import Metrics, code_meters, embedding_std, pair_meters, used_share
from methods.parts.norms import convert_split_batchnorm, has_batch_norm
from methods.parts.numerics import (
    autocast_disabled, chunk_rows, count_of_each, entropy, l2_normalize, to_device, upcast_half,
)  # fmt: skip
from methods.parts.patch_masks import block_mask, masked_patches, random_mask, unpack
from methods.parts.queue import FeatureQueue
from methods.parts.schedules import cosine, linear_by_epoch
from methods.parts.soft_targets import cross_entropy_sum, cross_view_loss
from methods.parts.views import CropGroup, Views, ViewsConfig
from methods.parts.vit import ViT, freeze_patch_projection, new_mask_token, require_vit, resize_grid, sincos_table, xavier_linears

__all__ = [
    "LARGER_BATCH",
    "LOWER_RATE",
    "BackboneConfig",
    "Center",
    "ConfigError",
    "CropGroup",
    "DINOHead",
    "FeatureQueue",
    "Hints",
    "Masks",
    "MemoryBank",
    "Method",
    "MethodConfig",
    "Metrics",
    "MomentumTeacher",
    "Outputs",
    "ParamGroup",
    "Progress",
    "Prototypes",
    "RunFacts",
    "SearchRange",
    "StepOutput",
    "ViT",
    "Views",
    "ViewsConfig",
    "all_gather_rows",
    "all_reduce_max",
    "all_reduce_sum",
    "at_least",
    "autocast_disabled",
    "below_one",
    "block_mask",
    "blunt_targets",
    "build_backbone",
    "chunk_rows",
    "code_meters",
    "contrast_meters",
    "convert_split_batchnorm",
    "cosine",
    "count_of_each",
    "cross_entropy_sum",
    "cross_view_loss",
    "draw_seed",
    "ema",
    "embedding_std",
    "entropy",
    "faster_average",
    "find",
    "first_places",
    "fraction",
    "freeze_patch_projection",
    "gather_with_gradient",
    "gram_loss",
    "has_batch_norm",
    "hidden_by",
    "info_nce",
    "info_nce_with_queue",
    "koleo",
    "l2_normalize",
    "limited",
    "linear_by_epoch",
    "many_clusters",
    "masked_of",
    "masked_patches",
    "mlp",
    "new_mask_token",
    "num_features",
    "num_kept",
    "num_patches",
    "num_patches_of_side",
    "one_of",
    "own_columns",
    "pair_meters",
    "param_groups_by_layer",
    "param_groups_weight_decay",
    "positive",
    "queue_beyond_images",
    "queue_filled_late",
    "random_keep",
    "random_mask",
    "random_words",
    "rank",
    "register",
    "registered",
    "require",
    "require_vit",
    "resize_grid",
    "searchable",
    "sigreg",
    "sincos_table",
    "sinkhorn",
    "slow_average",
    "to_device",
    "told",
    "trunc_normal_linears",
    "unpack",
    "upcast_half",
    "used_share",
    "without_drop_path",
    "world_size",
    "xavier_linears",
]  # fmt: skip
