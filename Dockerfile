# For GPU hosts. CUDA 13.0 because the pinned torch is built for it; "devel" because DeepSpeed compiles its kernels with nvcc.
#   docker build -t bert-pretraining .
#   docker run --gpus all --ipc=host -v "$PWD/runs:/workspace/runs" bert-pretraining make quickstart
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.12-dev python3.12-venv g++ make curl git openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace
COPY . .
RUN make venv PYTHON=python3.12
ENV PATH=/workspace/.venv/bin:$PATH
CMD ["make", "quickstart"]
