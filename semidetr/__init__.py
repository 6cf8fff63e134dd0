__version__ = "0.1.0"

_PUBLIC = {
    'core': 'SemiDETRError DataError ConfigError seed_everything pick_device',
    'boxes': 'cxcywh_to_xyxy xyxy_to_cxcywh box_iou generalized_box_iou transform_boxes',
    'draw': 'show_image draw_boxes image_grid draw_on_image',
    'data.catalog': 'open_dataset',
    'data.datasets': 'DetectionDataset Sample Unlabelled Subset',
    'data.splits': 'Split make_split save_split load_split read_index_list',
    'data.augment': 'ViewConfig labelled_view weak_view strong_view eval_view',
    'data.loader': 'SemiLoader EvalLoader collate',
    'data.doctor': 'check_dataset contact_sheet',
    'detectors.backbone': 'BackboneConfig build_backbone',
    'detectors.transformer': 'TransformerConfig',
    'detectors.denoising': 'DenoisingConfig',
    'detectors.contract': 'build_detector post_process',
    'detectors.detector': 'DetectorConfig Detector',
    'matching.matching': 'hungarian one_to_many',
    'matching.losses': 'CriterionConfig set_criterion',
    'train.config': 'Config preset load_config override with_detector config_hash',
    'train.plan': 'Plan plan_run',
    'train.loggers': 'Logger',
    'train.checkpoint': 'save_checkpoint load_checkpoint',
    'train.trainer': 'Trainer',
    'train.predict': 'Predictor',
    'train.api': 'Run predict evaluate split',
    'train.imports': 'import_weights',
    'train.onnx': 'export_run',
}
_WHERE = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = ['__version__', *_WHERE, 'train']


def __getattr__(name):
    "Import a public name when it is first used, so that `import semidetr` costs nothing"
    from importlib import import_module

    if name == 'train':  # a package that can be called
        return import_module('semidetr.train')
    if name not in _WHERE:
        raise AttributeError(f"module 'semidetr' has no attribute '{name}'")
    value = getattr(import_module(f'semidetr.{_WHERE[name]}'), name)
    globals()[name] = import_module('semidetr.docs').document(value)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
