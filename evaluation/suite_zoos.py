"""Zoos that suites are about, each from one recipe: what is missing is built, and never twice."""

from zoo.recipe import ZooOptions

DIGITS = ZooOptions(members=(2, 4, 8))
DIGITS_MANY = ZooOptions(
    members=(16, 32), train_families=1, validation_families=0, test_families=24
)
DIGITS_DEEP = ZooOptions(widths=(32, 32), members=(4,))
OTHER_SIZES = tuple(
    ZooOptions(widths=widths, members=(4,))
    for widths in ((16, 16), (64, 64), (128, 128), (32,), (32, 32, 32), (32, 32, 32, 32))
)
FASHION = {"task": "fashion-mnist", "objective": 6666, "relabel": True}
CNN = {"architecture": "convnet", "widths": (16, 32, 32), "lr": 3e-3}
SKEWED = {"alpha": 0.3, "segment_size": 1500, "epochs": 10, "lr": 3e-3}
FASHION_MLP = ZooOptions(
    **FASHION,
    widths=(128, 128),
    members=(10,),
    split="disjoint",
    segment_size=5000,
    epochs=8,
    lr=2e-3,
    train_families=16,
    validation_families=8,
    test_families=12,
)
FASHION_SKEWED = ZooOptions(
    **FASHION,
    **SKEWED,
    widths=(64,),
    members=(4, 10),
    train_families=160,
    validation_families=24,
    test_families=24,
)
FASHION_CNN = ZooOptions(  # members and their ensemble as in the setting that 84.2 is from
    **FASHION,
    **{**CNN, "lr": 1e-2},
    members=(8,),
    split="disjoint",
    segment_size=4000,
    epochs=4,
    train_families=8,
    validation_families=4,
    test_families=12,
)
FASHION_SKEWED_CNN = ZooOptions(
    **FASHION,
    **{**SKEWED, **CNN},
    members=(4,),
    train_families=32,
    validation_families=8,
    test_families=12,
)
MNIST_SKEWED = ZooOptions(
    task="mnist",
    objective=6666,
    relabel=True,
    **SKEWED,
    widths=(64,),
    members=(2, 4, 8),
    train_families=80,
    validation_families=12,
    test_families=12,
)
MIXED = {
    "task": "mnist",
    "objective": 6666,
    "relabel": True,
    "weight_decay": (0.0, 0.3),
    "lr": (0.001, 0.005),
    "train_families": 16,
    "validation_families": 4,
    "test_families": 12,
}
MNIST_MIXED = (
    ZooOptions(
        **MIXED, widths=(32,), members=(2, 4, 8), alpha=(0.3, 3), segment_size=1500, epochs=(3, 10)
    ),
    ZooOptions(
        **MIXED, widths=(128,), members=(3, 6), alpha=(0.3, 10), segment_size=3000, epochs=(3, 8)
    ),
    ZooOptions(
        **MIXED,
        widths=(64, 64),
        members=(2, 5, 8),
        alpha=(0.3, 10),
        segment_size=3000,
        epochs=(3, 8),
    ),
    ZooOptions(
        **MIXED,
        architecture="convnet",
        widths=(8, 16),
        members=(2, 4),
        alpha=(0.3, 3),
        segment_size=1500,
        epochs=5,
    ),
)
CIFAR = {
    "task": "cifar-10",
    "objective": 6666,
    "relabel": True,
    "members": (2, 4, 8),
    "split": "disjoint",
    "test_families": 12,
}
RESNETS = tuple(  # for a GPU
    ZooOptions(
        **CIFAR,
        architecture="resnet20",
        norm=norm,
        segment_size=5000,
        epochs=30,
        lr=3e-3,
        augment=("flip",),
        train_families=16,
        validation_families=4,
    )
    for norm in ("batch", "layer")
)
SLIM_RESNETS = tuple(  # for a CPU
    ZooOptions(
        **CIFAR,
        architecture="resnet8",
        norm=norm,
        segment_size=3000,
        epochs=5,
        lr=1e-2,
        train_families=6,
        validation_families=3,
    )
    for norm in ("batch", "layer")
)
TINY = ZooOptions(
    widths=(16,),
    members=(2, 3),
    segment_size=150,
    epochs=30,
    train_families=12,
    validation_families=6,
    test_families=8,
)
