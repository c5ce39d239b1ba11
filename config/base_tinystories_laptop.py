# Retrains what the laptop search on TinyStories found, on two CPU cores in about 6 minutes.
# python train_base.py config/base_tinystories_laptop.py --arch=out/search_tinystories_laptop_drnas/arch.json
out_dir = 'out/base_tinystories_laptop'
batch_size = 8
max_iters = 800
eval_interval = 200
eval_iters = 10
val_portion = 0.05
learning_rate = 2e-3
min_lr = learning_rate / 10
