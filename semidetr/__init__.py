__version__ = "0.1.0"

_PUBLIC = {
    'core': 'SemiDETRError DataError ConfigError seed_everything pick_device',
    'boxes': 'cxcywh_to_xyxy xyxy_to_cxcywh box_iou generalized_box_iou transform_boxes',
    'draw': 'show_image draw_boxes image_grid draw_on_image',
    'datasets': 'open_dataset DetectionDataset Sample Unlabelled Subset',
    'splits': 'Split make_split save_split load_split read_index_list',
    'augment': 'ViewConfig labelled_view weak_view strong_view eval_view',
    'loader': 'SemiLoader EvalLoader collate',
    'metrics': 'evaluate',
    'doctor': 'check_dataset contact_sheet',
    'backbone': 'BackboneConfig build_backbone',
    'transformer': 'TransformerConfig',
    'denoising': 'DenoisingConfig',
    'detector': 'DetectorConfig Detector post_process',
    'matching': 'hungarian one_to_many',
    'losses': 'CriterionConfig set_criterion',
    'config': 'Config preset load_config',
    'checkpoint': 'save_checkpoint load_checkpoint',
    'trainer': 'Trainer',
    'predict': 'Predictor',
}
_WHERE = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = ['__version__', *_WHERE]

def __getattr__(name):
    "Import a public name when it is first used, so that `import semidetr` costs nothing"
    if name not in _WHERE: raise AttributeError(f"module 'semidetr' has no attribute '{name}'")
    from importlib import import_module
    value = globals()[name] = getattr(import_module(f'semidetr.{_WHERE[name]}'), name)
    return value

def __dir__(): return sorted({*globals(), *__all__})
