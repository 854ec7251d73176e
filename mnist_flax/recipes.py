"""The named recipes. README has what they reach, experiments/log/ how they were chosen."""

import dataclasses

from mnist_flax.model import CNNConfig
from mnist_flax.models.columns import ColumnsConfig
from mnist_flax.models.separable import SeparableConfig
from mnist_flax.optimizer import SGD, AdamW, Constant, Muon, OneCycle, Staircase
from mnist_flax.recipe import AugmentConfig, PlateauConfig, Recipe, StoppingConfig

# The recipe of an older Keras notebook, and elsewhere called the notebook's: 915,146 parameters,
# plain SGD, five epochs.
BASELINE = Recipe(
    epochs=5,
    batch_size=64,
    model=CNNConfig(norm_momentum=0.99),
    augment=AugmentConfig(rotate=10.0, shift=0.1, zoom=0.1),
    optimizer=SGD(learning_rate=0.01, momentum=0.9, nesterov=False),
    schedule=Staircase(decay=0.9),
)

# Chosen on held-out training examples, then trained on all 60,000; README has what they reach.
# 72,058 parameters. Without padding the patches become 12 x 12 places, then 6, 4 and 2: of even
# sides, which Winograd's tiles fill. A network of 14, 7, 5 and 3 takes nearly twice as long.
QUICK = Recipe(
    val_size=0,
    epochs=1,
    batch_size=256,
    label_smoothing=0.1,
    model=CNNConfig(
        patch=2,
        widths=(24, 48, 128),
        padding=("VALID", "VALID", "VALID"),
        pool=(True, False, False),
        conv_bias=False,
        norm_momentum=0.9,
        hidden=(),
        dropout=0.0,
    ),
    optimizer=Muon(learning_rate=0.5, momentum=0.8, ns_steps=3, adam_ratio=0.05),
    schedule=OneCycle(warmup=0.2),
)

# The same network, augmented.
FAST = dataclasses.replace(
    QUICK,
    epochs=3,
    no_augment_fraction=0.05,
    augment=AugmentConfig(rotate=7.0, shift=0.03, zoom=0.06),
)

# 399,434 parameters. Slants and sizes that it need not learn are worth as much as more epochs.
# Larger batches, for Muon's products take as long for a small one.
STRONG = dataclasses.replace(
    QUICK,
    epochs=6,
    batch_size=512,
    no_augment_fraction=0.05,
    model=dataclasses.replace(
        QUICK.model,
        normalize=True,
        widths=(32, 64, 128, 256),
        padding=("VALID", "SAME", "VALID", "VALID"),
        pool=(True, False, False, False),
        dropout=0.4,
    ),
    augment=AugmentConfig(rotate=5.0, shift=0.03, zoom=0.05, shear=5.0),
    optimizer=dataclasses.replace(QUICK.optimizer, learning_rate=0.4),
)

# 388,212 parameters: a network of the images as they are, in full resolution, beside one like that
# of `strong`. They err on different images. Each sees half of the images in an epoch.
ACCURATE = dataclasses.replace(
    STRONG,
    epochs=48,
    model=ColumnsConfig(
        (
            dataclasses.replace(
                STRONG.model,
                normalize=False,
                patch=1,
                widths=(32, 32, 32, 64, 64, 64, 128),
                padding=("VALID", "VALID", "SAME", "VALID", "VALID", "SAME", "VALID"),
                pool=(False, False, True, False, False, True, False),
            ),
            dataclasses.replace(
                STRONG.model, widths=(32, 64, 96, 128), padding=("SAME", "SAME", "VALID", "VALID")
            ),
        )
    ),
    augment=AugmentConfig(rotate=10.0, shift=0.06, zoom=0.09, shear=10.0),
)

# With validation and early stopping; 169,018 parameters. No label smoothing: the plain validation
# loss, which selects the epoch, would prefer an early one.
DEFAULT = dataclasses.replace(
    QUICK,
    val_size=5000,
    epochs=5,
    label_smoothing=0.0,
    model=dataclasses.replace(
        QUICK.model,
        widths=(24, 48, 96, 128),
        padding=("VALID", "SAME", "VALID", "VALID"),
        pool=(True, False, False, False),
    ),
    augment=AugmentConfig(rotate=10.0, shift=0.05, zoom=0.1),
    optimizer=STRONG.optimizer,
    stopping=StoppingConfig(patience=2),
)

# What Keras users reach for: Adam at a constant rate, which is lowered when the validation loss
# stops falling, and early stopping. The network is that of `default`.
KERAS = dataclasses.replace(
    DEFAULT,
    epochs=20,
    batch_size=128,
    optimizer=AdamW(learning_rate=2e-3),
    schedule=Constant(),
    plateau=PlateauConfig(patience=2, factor=0.3),
    stopping=StoppingConfig(patience=5),
)

# The small ones were chosen on validation by one run or two of a candidate: experiments/log/.
# 1,896 parameters. BatchNorm's scales would only cost some: the next convolution has its own.
# Slants and sizes that it need not learn leave more of them for digits.
TINY2K = dataclasses.replace(
    QUICK,
    epochs=60,
    batch_size=64,
    label_smoothing=0.0,
    model=SeparableConfig(
        normalize=True,
        widths=(10, 14, 17, 18, 18),
        padding=("SAME", "VALID", "VALID", "VALID", "VALID"),
        pool=(True, False, False, False, False),
        norm_scale=False,
        head="mean",
        hidden=(),
        dropout=0.0,
    ),
    optimizer=Muon(learning_rate=1.0, momentum=0.8, ns_steps=5, adam_ratio=0.1, weight_decay=0.002),
)

# 694 parameters. Kernels of six patterns, then of four, leave room for a few more channels.
TINY700 = dataclasses.replace(
    TINY2K,
    model=dataclasses.replace(TINY2K.model, widths=(8, 7, 10, 11, 10), patterns=(6, 4, 4, 4, 4)),
)

# 7,666 parameters. Enough to fit the training images: here augmentation pays.
TINY8K = dataclasses.replace(
    TINY2K,
    batch_size=128,
    model=dataclasses.replace(TINY2K.model, normalize=False, widths=(16, 32, 40, 44, 48)),
    augment=AugmentConfig(rotate=8.0, shift=0.05, zoom=0.08),
)

# For Fashion-MNIST, of which handwriting's affine maps are no augmentation: mirror images and a
# pixel's shift. 298,410 parameters, in full resolution: patches cost a point of accuracy here.
FASHION = dataclasses.replace(
    STRONG,
    dataset="fashion_mnist",
    val_size=5000,
    model=dataclasses.replace(
        STRONG.model,
        normalize=False,
        patch=1,
        widths=(32, 32, 64, 64, 128, 128),
        padding=("SAME",) * 6,
        pool=(False, True, False, True, False, True),
    ),
    augment=AugmentConfig(flip=True, crop=1),
)

RECIPES = {"baseline": BASELINE, "keras": KERAS, "default": DEFAULT, "quick": QUICK}
RECIPES |= {"fast": FAST, "strong": STRONG, "accurate": ACCURATE}
RECIPES |= {"tiny700": TINY700, "tiny2k": TINY2K, "tiny8k": TINY8K, "fashion": FASHION}

# The recipe of a dataset for which none is named; of all others it is `default`.
OF_DATASET = {"fashion_mnist": "fashion"}
