"""A plugin of pytest: leaves out of test_cuda.py what a CPU in a GPU's place is slow at, or cannot pass."""

LARGE = ("1000", "2048", "4096", "5000", "65536", "grid_row")
NEEDS_A_GPU = (
    "tf32",
    "fused_kernel",  # torch's, which on a CPU rounds otherwise
    "whose_products",
    "on_the_host",
    "on_the_gpu",
    "does_not_wait",
    "autocast",
    "out_of_bounds",
    "captures_a_step",  # a stand-in's capture computes
    "captures_clipping",
    "test_a_step_",
)


def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if any(name in item.name for name in (*NEEDS_A_GPU, *LARGE))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
