# Trains a network that config/search_swinir_samples.py found, on a laptop.
# python train_base.py config/base_swinir_samples.py --arch=out/search_swinir_samples_drnas/arch.json
# python analyze.py --out_dir=out/base_swinir_samples --images=sr_samples
include('shared/swinir_samples.py')
out_dir = 'out/base_swinir_samples'
max_iters = 1000
eval_interval = 250
min_lr = 1e-5
