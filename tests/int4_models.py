"""Calibrated int4 weights for the folders of tiny models."""

from layerskip_core.checkpoint.beside import fingerprint, int4_content, matrix_names
from layerskip_core.checkpoint.folder import INT4_FILE
from layerskip_core.checkpoint.open import for_training
from layerskip_core.checkpoint.save import save_beside
from layerskip_core.model.weights import int4_of, stored


def add_int4(folder, change=lambda weight: weight):
    """Calibrated weights that differ visibly from rounded ones, if `change` does."""
    model, spec = (trained := for_training(str(folder), "cpu")).model, trained.backend.spec
    names = matrix_names(spec)
    rows = {name: stored(int4_of(change(model.get_parameter(name).detach()))) for name in names}
    save_beside(str(folder), INT4_FILE, int4_content(rows, fingerprint(spec, model.get_parameter), {"texts": "3"}))
