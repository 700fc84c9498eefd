#!/usr/bin/env bash
# scipy 1.17.1, scipy.sparse.linalg.svds: the leading singular values of a Gaussian matrix, as weights are at first.
#
# solver="propack" gives up with its default number of iterations (10 k) on most of these shapes; solver="arpack" finds
# all of them to rounding. Whoever starts an adapter from singular vectors (PiSSA) should not choose propack by default.
#
# Output seen (numpy 2.4.6):
#   (1024, 4096) k=16 propack: LinAlgError k=16 singular triplets did not converge within kmax=160 iterations
#   (1024, 4096) k=16 arpack: largest relative error below 1e-12
#   (576, 1536) k=8 propack: LinAlgError k=8 singular triplets did not converge within kmax=80 iterations
#   (576, 1536) k=8 arpack: largest relative error below 1e-12
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" scipy==1.17.1 numpy==2.4.6
PYTHONPATH="$folder" python3 - <<'PYTHON'
import numpy as np
from scipy.sparse.linalg import svds

for shape, k in (((1024, 4096), 16), ((576, 1536), 8)):
    matrix = np.random.default_rng(1).standard_normal(shape)
    exact = np.linalg.svd(matrix, compute_uv=False)[:k]
    try:
        svds(matrix, k=k, solver="propack", rng=np.random.default_rng(0))
        raise SystemExit("propack converges")
    except np.linalg.LinAlgError as error:
        print(f"{shape} k={k} propack: LinAlgError {error}")
    found = np.sort(svds(matrix, k=k, solver="arpack", rng=np.random.default_rng(0))[1])[::-1]
    assert abs(found / exact - 1).max() < 1e-12
    print(f"{shape} k={k} arpack: largest relative error below 1e-12")
PYTHON
