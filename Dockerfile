# The project with its environment: `docker build --tag sparsity-atlas .`
# Jobs of profiles/kubernetes run in it, and of any other by `--software-deployment-method apptainer`.
# PyPI's build of torch for Linux brings CUDA; the host brings the driver.
FROM python:3.12.11-slim-bookworm

# Triton compiles its launchers when a kernel is first used; storage in a folder copies with rsync.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev rsync \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/sparsity-atlas
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --editable '.[kubernetes,s3]'
COPY Snakefile config.yaml ./
COPY workflow workflow
COPY profiles profiles
COPY envs envs

CMD ["snakemake", "--cores", "all"]
