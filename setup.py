from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]


def words(k):
    return cfg.get(k, "").split()


def lines(k):
    return [o.strip() for o in cfg.get(k, "").splitlines() if o.strip()]


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    packages=find_packages(
        include=[cfg["lib_path"], cfg["lib_path"] + ".*"], exclude=[cfg["lib_path"] + ".book*"]
    ),  # the pages need a checkout
    package_data={cfg["lib_path"]: words("package_data")},
    include_package_data=False,
    python_requires=">=" + cfg["min_python"],
    install_requires=words("requirements"),
    extras_require={
        "book": words("book_requirements"),
        "bench": words("bench_requirements"),
        "cluster": words("cluster_requirements"),
        "export": words("export_requirements"),
        "video": words("video_requirements"),
        "mlflow": words("mlflow_requirements"),
        "wandb": words("wandb_requirements"),
    },
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
